"""The largest pack before the first rollout; where activations live; what compiled blocks and gather-once give."""

import json
import subprocess

import pytest
import torch
from jobs import python, records, succeeded, torchrun

from lead_fast import train
from lead_fast.checks import check_parallel
from lead_fast.cli import load_config
from lead_fast.learner.attention import attention_in_use
from lead_fast.learner.memory import GRANULE, line_budget, remedy

SETUP = """
import json, resource, sys, weakref
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from lead_fast.cli import load_config
from lead_fast.runtime.ranks import start, stop
from lead_fast.learner.loss import policy_loss
from lead_fast.learner.memory import rehearse, worst_pack
from lead_fast.learner.policy import load_policy
from lead_fast.learner.optimizer import make_optimizer

def policy_of(*args):
    torch.manual_seed(0)
    c = load_config(list(args))
    ranks = start(c.parallel)
    policy = load_policy(c.model, c.parallel, ranks)
    return c, ranks, policy, make_optimizer(policy, c.optim)

found = {}
"""

ONE_RANK = (
    SETUP
    + """
c, ranks, policy, optimizer = policy_of("--parallel.rehearse=always", "--parallel.pack_tokens=600")
before = [p.full_tensor().clone() for p in policy.parameters()]
c = rehearse(policy, None, optimizer, c, ranks)
same = all(torch.equal(a, p.full_tensor()) for a, p in zip(before, policy.parameters()))
found["rehearsal"] = {
    "same": same, "state": len(optimizer.state), "grads": sum(p.grad is not None for p in policy.parameters()),
    "lr": optimizer.param_groups[0]["lr"] == c.optim.lr, "tokens": c.parallel.pack_tokens}

pack, o = worst_pack(1000, 300, ranks)
found["worst pack"] = {"lengths": pack.lengths, "rows": len(pack.rows_R), "T": len(pack.input_ids_T)}

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, a=(), k=None):
        out = f(*a, **(k or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                s = t.untyped_storage()
                if s._cdata not in live:
                    live[s._cdata] = s.nbytes()
                    weakref.finalize(s, live.pop, s._cdata, None)
        return out

found["held"] = {}
for kind in ("none", "selective", "full"):
    c, ranks, policy, optimizer = policy_of(f"--model.activation_checkpointing={kind}")
    pack, o = worst_pack(512, 256, ranks)
    live = {}
    policy(pack, lambda h, w: h.sum())  # gathers once
    live.clear()
    with Count():
        loss = policy(pack, lambda h, w: h.sum())
        found["held"][kind] = sum(live.values())
    del loss

grads = {}
for compiled in ("false", "true"):
    c, ranks, policy, optimizer = policy_of(f"--model.compile={compiled}", "--model.activation_checkpointing=full")
    for tokens in (90, 130):
        pack, o = worst_pack(tokens, 50, ranks)
        policy_loss(policy, pack, o, c).loss.backward()
    policy.to_shards()
    grads[compiled] = torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()])
off = (grads["true"] - grads["false"]).norm() / grads["false"].norm()
found["compiled"] = {"off": off.item(), "norm": grads["true"].norm().item()}

# Last: real memory that ends. The address space is limited, and the pack is larger.
c, ranks, policy, optimizer = policy_of("--parallel.rehearse=always", "--parallel.pack_tokens=400000")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), -1))
try:
    rehearse(policy, None, optimizer, c, ranks)
except ValueError as e:
    found["out of memory"] = str(e)
print(json.dumps(found))
stop()
"""
)

TWO_RANKS = (
    SETUP
    + """
class Names(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, a=(), k=None):
        seen.append(str(f))
        return f(*a, **(k or {}))

for reshard in ("false", "true"):
    seen = []
    c, ranks, policy, optimizer = policy_of(f"--parallel.reshard={reshard}")
    pack, o = worst_pack(128, 64, ranks)
    with Names():
        for _ in range(3):
            policy_loss(policy, pack, o, c).loss.backward()
        policy.to_shards()
    found[reshard] = {
        "gather": sum("allgather" in x for x in seen), "reduce": sum("reduce_scatter" in x for x in seen),
        "c10d": sorted({x for x in seen if "c10d" in x})}
if ranks.main:
    print(json.dumps(found))
stop()
"""
)


def printed(done: subprocess.CompletedProcess) -> dict:
    found = json.loads(next(line for line in succeeded(done).stdout.splitlines() if line.startswith("{")))
    return found | {"stdout": done.stdout}


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return printed(python("-c", ONE_RANK))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    script = tmp_path_factory.mktemp("memory") / "script.py"
    script.write_text(TWO_RANKS)
    return printed(torchrun(2, str(script)))


def test_a_rehearsal_leaves_weights_and_optimiser_as_they_were(one_rank):
    assert one_rank["rehearsal"] == {"same": True, "state": 0, "grads": 0, "lr": True, "tokens": 600}
    assert "Rehearsal: a pack of 600 tokens fits." in one_rank["stdout"]


def test_out_of_memory_comes_before_the_first_rollout_with_a_remedy(one_rank):
    said = one_rank["out of memory"]
    assert said.startswith("Out of memory in the largest pack") and "400,000 tokens" in said
    assert said.endswith("give --model.activation_checkpointing=full.")


def test_the_worst_pack_is_nearly_all_answers_and_no_sequence_is_too_long(one_rank):
    assert one_rank["worst pack"] == {"lengths": [300, 300, 300, 100], "rows": 1000, "T": 1000}


def test_the_budget_is_where_the_line_meets_the_room():
    assert line_budget((2048, 6144), (10_000_000, 14_000_000), 30_000_000) == (2048 + 20480) // GRANULE * GRANULE
    assert line_budget((2048, 6144), (10, 10), 5) < 2048  # a flat line, and no room at all


def test_remedies_come_in_order():
    class Eight:
        world, rank = 8, 0

    def said(*args: str) -> str:
        return remedy(load_config(["--recipe=lead-14b", *args]), 32768, 15360, Eight)  # type: ignore[arg-type]

    none = "--model.activation_checkpointing=none"
    assert said(none).endswith("activation_checkpointing=full")
    assert said("--parallel.reshard=false").endswith("reshard=true")
    assert said().startswith("give --parallel.pack_tokens=15360")
    assert "--parallel.sequence=2" in remedy(load_config(["--recipe=lead-14b"]), 15360, 15360, Eight)  # type: ignore[arg-type]


def test_less_is_held_for_the_backward_pass_with_selective_and_full_checkpointing(one_rank):
    """Bytes of tensors that autograd saves: none > selective > full; gradients are compared in test_training."""
    held = one_rank["held"]
    assert held["full"] < 0.5 * held["selective"] and held["selective"] < 0.9 * held["none"], held


@pytest.mark.parametrize("reshard,gathers", [(False, 1), (True, 3)])
def test_weights_are_gathered_once_a_step_without_resharding(two_ranks, reshard, gathers):
    """All-gathers of three packs: one a unit (4 blocks and the rest), or one a pack and direction with resharding."""
    found = two_ranks[str(reshard).lower()]
    blocks = 4
    assert found["reduce"] == 3 * (blocks + 1)
    assert found["gather"] == (blocks + 1 if gathers == 1 else 3 * (2 * blocks + 1)), found


def test_compiled_blocks_give_the_same_gradient(one_rank):
    found = one_rank["compiled"]
    assert 0 < found["norm"] and found["off"] < 1e-5


def test_savings_are_logged(tiny_run):
    assert "Attention: torch's scaled_dot_product_attention" in (tiny_run.parent / "out.txt").read_text()
    row = records(tiny_run, "train")[0]
    trained = row["tokens"] - row["tokens_skipped"] - 16
    assert row["passes_skipped"] == 2 * row["packs"] and 0 <= row["head_rows_skipped"] < trained
    for row in records(tiny_run, "train"):
        assert (row["tokens_skipped"] > 0) == (row["sequences_skipped"] > 0)


def test_attention_is_named():
    assert "scaled_dot_product_attention" in attention_in_use(torch.device("cpu"), "bfloat16", 128)
    assert "scaled_dot_product_attention" in attention_in_use(torch.device("cuda"), "float32", 128)


@pytest.mark.parametrize(
    "args,words",
    [
        (["--parallel.pack_tokens=-1"], "parallel.pack_tokens is -1"),
        (["--parallel.offload=activations"], "model.activation_checkpointing=none"),
        (["--model.compile", "--model.activation_checkpointing=selective"], "must see single operators"),
    ],
)
def test_what_does_not_fit_together_is_said(args, words):
    c = load_config(args)
    with pytest.raises(ValueError, match=words):
        check_parallel(c.model, c.parallel)


@pytest.mark.parametrize(
    "args,words",
    [
        (["--parallel.replicate=3"], "parallel.replicate is 3, which does not divide 1 ranks"),
        (["--parallel.sequence=2"], "parallel.sequence is 2, which does not divide 1 ranks"),
    ],
)
def test_layouts_that_the_ranks_cannot_have_are_said(args, words, single_rank):
    with pytest.raises(ValueError, match=words):
        train.main(args)
