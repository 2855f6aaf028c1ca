"""Test memory: the largest pack before the first rollout, where activations live, compiled blocks, gathering once."""

import dataclasses
import gc
import json
import subprocess

import pytest
import torch
from jobs import python, records, succeeded, torchrun
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from lead_fast import train
from lead_fast.checks import check_parallel
from lead_fast.cli import load_config
from lead_fast.learner.attention import attention_in_use
from lead_fast.learner.memory import (
    GRANULE,
    SLEEPING_VLLM,
    _budget,
    engine_bytes,
    line_budget,
    rehearse_pack,
    remedy,
    worst_pack,
)
from lead_fast.learner.model import load_model
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.policy import _keep, load_policy, make_policy

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

measured = {}
"""

ONE_RANK = (
    SETUP
    + """
c, ranks, policy, optimizer = policy_of("--parallel.rehearse=always", "--parallel.pack_tokens=600")
before = [p.full_tensor().clone() for p in policy.parameters()]
c = rehearse(policy, None, optimizer, c, ranks)
same = all(torch.equal(a, p.full_tensor()) for a, p in zip(before, policy.parameters()))
measured["rehearsal"] = {
    "same": same, "state": len(optimizer.state), "grads": sum(p.grad is not None for p in policy.parameters()),
    "lr": optimizer.param_groups[0]["lr"] == c.optim.lr, "tokens": c.parallel.pack_tokens}

pack, o = worst_pack(1000, 300, ranks)
measured["worst pack"] = {"lengths": pack.lengths, "rows": len(pack.rows_R), "T": len(pack.input_ids_T)}

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

measured["held"] = {}
for kind in ("none", "selective", "full"):
    c, ranks, policy, optimizer = policy_of(f"--model.activation_checkpointing={kind}")
    pack, o = worst_pack(512, 256, ranks)
    live = {}
    policy(pack, lambda h, w: h.sum())  # gathers once
    live.clear()
    with Count():
        loss = policy(pack, lambda h, w: h.sum())
        measured["held"][kind] = sum(live.values())
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
measured["compiled"] = {"off": off.item(), "norm": grads["true"].norm().item()}

# Last: real memory that ends. The address space is limited, and the pack is larger.
c, ranks, policy, optimizer = policy_of("--parallel.rehearse=always", "--parallel.pack_tokens=400000")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), -1))
try:
    rehearse(policy, None, optimizer, c, ranks)
except ValueError as e:
    measured["out of memory"] = str(e)
print(json.dumps(measured))
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
    measured[reshard] = {
        "gather": sum("allgather" in x for x in seen), "reduce": sum("reduce_scatter" in x for x in seen),
        "c10d": sorted({x for x in seen if "c10d" in x})}
if ranks.main:
    print(json.dumps(measured))
stop()
"""
)


LOADING = (
    SETUP
    + """
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from lead_fast.learner import checkpoint, load
from lead_fast.learner.model import load_model, load_tokenizer
from lead_fast.learner.policy import make_policy

ranks, here = start(), Path(sys.argv[1])
tokenizer = load_tokenizer(load_config([]).model)
tiny = Path(tokenizer.name_or_path)

def write(name, kind, config, **more):
    torch.manual_seed(1)
    kind(config(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, **more)).bfloat16().save_pretrained(
                    here / name, max_shard_size="100KB")

if ranks.main:
    write("tied", Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True)
    write("yarn", LlamaForCausalLM, LlamaConfig, tie_word_embeddings=False,
          rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                           "original_max_position_embeddings": 32})
    for name in ("renamed", "misshapen", "damaged", "lacking"):
        (here / name).mkdir()
        for f in tiny.iterdir():
            if f.name != "model.safetensors":
                (here / name / f.name).write_bytes(f.read_bytes())
    tensors = load_file(tiny / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, here / "renamed" / "model.safetensors",
              metadata={"format": "pt"})
    (here / "damaged" / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:100_000])
    del tensors["model.norm.weight"]
    save_file(tensors, here / "lacking" / "model.safetensors", metadata={"format": "pt"})
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, here / "misshapen" / "model.safetensors", metadata={"format": "pt"})
ranks.barrier()

def bits(policy):
    out = {n: p.full_tensor() for n, p in policy.named_parameters(remove_duplicate=False)}
    return out | {n: b for n, b in policy.named_buffers()}

def exported(policy, folder, dtype):
    checkpoint.export(folder, policy, tokenizer, dtype, ranks)
    return {f.name: f.read_bytes() for f in folder.iterdir()}

unsharded_load = load.load_model
for name in ("tiny", "tied", "yarn", "renamed"):
    c = load_config([f"--model={name if name == 'tiny' else here / name}"])
    calls = []
    load.load_model = lambda *a: calls.append(a) or unsharded_load(*a)
    parts = load_policy(c.model, c.parallel, ranks)
    load.load_model = unsharded_load
    unsharded = make_policy(load_model(c.model), None, c.model, c.parallel, ranks)
    a, b = bits(parts), bits(unsharded)
    files = [exported(p, here / f"{name} {i}", torch.bfloat16) for i, p in enumerate((parts, unsharded))]
    measured[name] = {
        "names": a.keys() == b.keys(), "bits": all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a),
        "buffers": [n for n, _ in parts.named_buffers()], "calls": len(calls),
        "tied": parts.model.lm_head.weight is parts.model.model.embed_tokens.weight,
        "training": [m.training for m in parts.modules()] == [m.training for m in unsharded.modules()],
        "files": sorted(n for n in files[0] if files[0] != files[1] and files[0][n] != files[1].get(n)),
        "scaling": getattr(parts.model.model.rotary_emb, "attention_scaling", None)
        == getattr(unsharded.model.model.rotary_emb, "attention_scaling", None)}
for name in ("misshapen", "damaged", "lacking"):
    try:
        load_policy(load_config([f"--model={here / name}"]).model, c.parallel, ranks)
    except ValueError as e:
        measured[name] = str(e)

# The peak of tensors' memory; what is mapped from a file is not counted.
big = LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
                  num_attention_heads=4, num_key_value_heads=4)
if ranks.main:
    LlamaForCausalLM(big).bfloat16().save_pretrained(here / "big")
ranks.barrier()
c = load_config([f"--model={here / 'big'}"])

class Peak(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()
    def __torch_dispatch__(self, f, types, a=(), k=None):
        out = f(*a, **(k or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if type(t) is torch.Tensor and t.device.type == "cpu":  # a DTensor's storage is its shard's
                s = t.untyped_storage()
                if s._cdata not in self.seen:
                    self.seen.add(s._cdata)
                    self.live += s.nbytes()
                    weakref.finalize(s, self.gone, s._cdata, s.nbytes())
        self.peak = max(self.peak, self.live)
        return out
    def gone(self, key, size):
        self.seen.discard(key)
        self.live -= size

def peak(load):
    with Peak() as mode:
        policy = load()
    return mode.peak, policy

measured["peak"], policy = peak(lambda: load_policy(c.model, c.parallel, ranks))
measured["shards"] = sum(p.to_local().nbytes for p in policy.parameters())
measured["unit"] = max(sum(p.numel() for p in m.parameters()) * 4 for m in policy.model.model.layers)
root = [p for n, p in policy.named_parameters() if "layers" not in n]
measured["unit"] = max(measured["unit"], 4 * sum(p.numel() for p in root))
measured["bytes"] = 4 * sum(p.numel() for p in policy.parameters())
if ranks.main:
    print(json.dumps(measured))
stop()
"""
)


def printed(done: subprocess.CompletedProcess) -> dict:
    measured = json.loads(next(line for line in succeeded(done).stdout.splitlines() if line.startswith("{")))
    return measured | {"stdout": done.stdout}


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return printed(python("-c", ONE_RANK))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    script = tmp_path_factory.mktemp("memory") / "script.py"
    script.write_text(TWO_RANKS)
    return printed(torchrun(2, str(script)))


@pytest.fixture(scope="module")
def loading(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("loading")
    (folder / "script.py").write_text(LOADING)
    return printed(torchrun(2, str(folder / "script.py"), str(folder)))


@pytest.mark.parametrize("name", ["tiny", "tied", "yarn", "renamed"])
def test_a_model_loaded_by_blocks_has_the_bits_of_one_loaded_unsharded(name, loading):
    """Compares weights, tied heads, rotary buffers, modes, and every file of the export, on two ranks."""
    case = loading[name]
    assert case["names"] and case["bits"] and case["training"] and case["scaling"] and case["files"] == []
    assert any("inv_freq" in b for b in case["buffers"]) and case["tied"] == (name in ("tied", "tiny", "renamed"))
    assert case["calls"] == (name == "renamed")  # transformers loads files that it must convert
    assert (f"{name} unsharded on every rank (its files have no tensor model." in loading["stdout"]) == case["calls"]


def test_a_rank_never_holds_more_than_its_shards_and_one_unit_while_it_loads(loading):
    assert loading["peak"] <= loading["shards"] + 1.6 * loading["unit"], loading
    assert loading["peak"] < 0.75 * loading["bytes"] and loading["shards"] < 0.51 * loading["bytes"]


def test_what_is_wrong_with_a_models_files_is_one_sentence(loading):
    assert loading["lacking"].endswith("is incomplete: its files have no tensor model.norm.weight.")
    assert "cannot be loaded: model.safetensors is damaged (" in loading["damaged"] and "\n" not in loading["damaged"]
    assert "cannot be loaded: model.norm.weight has shape [3] in its files and [" in loading["misshapen"]


def test_the_host_computes_the_step_of_offloaded_shards_with_this_ranks_part_of_the_cores(single_rank, monkeypatch):
    c = load_config([])
    policy = load_policy(c.model, c.parallel, single_rank)
    optimizer = make_optimizer(policy, c.optim)
    used, step, before = [], optimizer.step, torch.get_num_threads()
    monkeypatch.setattr("lead_fast.learner.optimizer.host_threads", lambda: before + 2)
    monkeypatch.setattr(optimizer, "step", lambda: (used.append(torch.get_num_threads()), step()))
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    update(policy, optimizer, 1e-3, 1.0)
    assert used == [before + 2] and torch.get_num_threads() == before


def test_gradients_are_summed_by_plain_sums_on_every_device(single_rank):
    """Without this, a divide factor of 1 leads to NCCL's PREMUL_SUM, which NVLS refuses in fp32."""
    c = load_config([])
    elsewhere = dataclasses.replace(single_rank, device=torch.device("meta"))
    for ranks in (single_rank, elsewhere):
        policy = make_policy(load_model(c.model), None, c.model, c.parallel, ranks)
        groups = [m._get_fsdp_state()._fsdp_param_group for m in policy.modules() if isinstance(m, FSDPModule)]
        assert len(groups) == 5 and all(g.force_sum_reduction_for_comms for g in groups)


@pytest.mark.parametrize("kind, times", [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_checkpointing_keeps_attentions_output(kind, times, single_rank):
    c = load_config([f"--model.activation_checkpointing={kind}"])
    policy = load_policy(c.model, c.parallel, single_rank)
    pack, _ = worst_pack(60, 20, single_rank)
    count = 0

    class Attentions(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, a=(), k=None):
            nonlocal count
            count += "scaled_dot_product" in str(f) and "backward" not in str(f)
            return f(*a, **(k or {}))

    with Attentions():
        policy(pack, lambda h, head: (h @ head.weight.T).logsumexp(-1).sum()).backward()
    assert count == times * len(policy.model.model.layers)


def test_selective_checkpointing_knows_the_operator_of_packed_attention():
    import torch.nn.attention.varlen  # registers the operator

    assert torch.nn.attention.varlen
    operator = torch.ops.torch_attn._varlen_attn.default
    assert _keep(None, operator) == CheckpointPolicy.MUST_SAVE != _keep(None, torch.ops.aten.silu.default)


def test_room_is_left_for_the_engine_that_does_not_exist_yet(single_rank):
    c = load_config(["--rollout.engine=vllm"])
    policy = load_policy(c.model, c.parallel, single_rank)
    parameters = sum(p.numel() for p in policy.parameters())
    assert engine_bytes(policy, c, "cuda") == SLEEPING_VLLM and engine_bytes(policy, c, "cpu") == 0
    other = load_config(["--rollout.engine=transformers", "--model.dtype=bfloat16"])
    assert engine_bytes(policy, other, "cuda") == 2 * parameters
    held = []

    def gradient(tokens: int) -> None:
        held.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.uint8))

    always = load_config(["--parallel.rehearse=always", "--parallel.pack_tokens=64"])
    rehearse_pack(policy, make_optimizer(policy, c.optim), always, 32, gradient, single_rank, aside=12345)
    assert held == [12345]


def test_a_measured_budget_is_smaller_by_what_the_engine_keeps(single_rank, monkeypatch):
    """Uses numbers as a GPU's allocator would report them: memory set aside counts in peaks and in reserved memory."""
    per_token, total = 1000, 100_000_000

    def budget(aside: int) -> int:
        tokens_seen: list[int] = []
        cuda = {"empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None,
                "max_memory_allocated": lambda: aside + 1_000_000 + per_token * tokens_seen[-1],
                "memory_reserved": lambda: aside + 1_000_000,
                "mem_get_info": lambda: (total - 1_000_000 - aside, total)}  # fmt: skip
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        return _budget(tokens_seen.append, single_rank)

    assert budget(0) - budget(20_480_000) == 20_480_000 // per_token


def test_a_rehearsal_leaves_weights_and_optimiser_as_they_were(one_rank):
    assert one_rank["rehearsal"] == {"same": True, "state": 0, "grads": 0, "lr": True, "tokens": 600}
    assert "Rehearsal: a pack of 600 tokens fits." in one_rank["stdout"]


def test_out_of_memory_comes_before_the_first_rollout_with_a_remedy(one_rank):
    said = one_rank["out of memory"]
    assert said.startswith("Out of memory in the largest pack") and "400,000 tokens" in said
    assert said.endswith("give --model.activation_checkpointing=full.")


def test_the_worst_pack_is_nearly_all_responses_and_no_sequence_is_too_long(one_rank):
    assert one_rank["worst pack"] == {"lengths": [300, 300, 300, 100], "rows": 1000, "T": 1000}


def test_the_budget_is_where_the_line_meets_the_room():
    assert line_budget((2048, 6144), (10_000_000, 14_000_000), 30_000_000) == (2048 + 20480) // GRANULE * GRANULE
    assert line_budget((2048, 6144), (10, 10), 5) < 2048  # a flat line, and no room left


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
    """Compares bytes of tensors that autograd saves: none > selective > full; test_training compares gradients."""
    held = one_rank["held"]
    assert held["full"] < 0.5 * held["selective"] and held["selective"] < 0.9 * held["none"], held


@pytest.mark.parametrize("reshard,gathers", [(False, 1), (True, 3)])
def test_weights_are_gathered_once_a_step_without_resharding(two_ranks, reshard, gathers):
    """All-gathers for three packs: one per unit (4 blocks and the rest), or with resharding per pack and direction."""
    measured = two_ranks[str(reshard).lower()]
    blocks = 4
    assert measured["reduce"] == 3 * (blocks + 1)
    assert measured["gather"] == (blocks + 1 if gathers == 1 else 3 * (2 * blocks + 1)), measured


def test_compiled_blocks_give_the_same_gradient(one_rank):
    measured = one_rank["compiled"]
    assert 0 < measured["norm"] and measured["off"] < 1e-5


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
        (["--parallel.offload=activations"], "model.activation_checkpointing=none"),
        (["--model.compile", "--model.activation_checkpointing=selective"], "must see single operations"),
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
