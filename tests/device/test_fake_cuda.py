"""Test forward and loss of lead-14b and lead-7b on fake CUDA tensors: operators, their dtypes, and no waits.

Fake tensors have a device and a shape but no memory, so no GPU is needed. A CPU build of torch can neither record
gradients on them nor index them (`IndexByOperators` does), so there the forward runs without gradients. In the CUDA
build (make check-cuda) it runs with gradients.
"""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lead_fast.cli import load_config
from lead_fast.learner.attention import Attention
from lead_fast.learner.head import HeadForm
from lead_fast.learner.loss import Objective, pack_logprobs, policy_loss
from lead_fast.learner.packing import Pack, make_pack
from lead_fast.learner.policy import Policy, prepare_blocks
from lead_fast.planner.shapes import shape_of
from lead_kernels import Groups, Outcomes, Sequences, Tokens, _head, linear_logprobs, linear_policy_loss
from lead_kernels.linear_logprobs import linear_logprobs_op
from lead_kernels.linear_policy_loss import linear_policy_loss_op
from lead_kernels.policy_loss import RowMetrics, needs_first_pass
from lead_kernels.testing.oracle import MODES

pytestmark = pytest.mark.quick

CUDA = torch.device("cuda")
CUDA_BUILD = torch.version.cuda is not None
aten = torch.ops.aten
# Operators whose result the host needs before it can continue: a number, or a shape that depends on values.
WAITS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
         aten.unique_dim, aten.unique_consecutive, aten.bincount}  # fmt: skip


class NoWait(TorchDispatchMode):
    """Record every operator, and raise AssertionError if the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        if any(x.is_cuda for x in tensors):
            masks = func is aten.index.Tensor and any(x.dtype == torch.bool for x in args[1] if x is not None)
            repeats = func is aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
            assert not (func._overloadpacket in WAITS or masks or repeats), f"{func} waits for the device"
        names = [a.name for a in func._schema.arguments]
        self.seen.append((str(func), dict(zip(names, args, strict=False)) | (kwargs or {})))
        into = (kwargs or {}).get("out")
        out = func(*args, **(kwargs or {})) if CUDA_BUILD or into is None else into  # a copy needs the device too
        home = any(x.is_cuda for x in tensors) and torch.is_tensor(out) and not out.is_cuda
        assert not home, f"{func} brings a tensor from the device to the host"
        return out

    def calls(self, word: str) -> list[dict[str, Any]]:
        return [given for name, given in self.seen if word in name]


class IndexByOperators(TorchFunctionMode):
    """x[...] of a CUDA tensor by operators, because indexing asks a CPU build of torch for its CUDA device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].is_cuda:
            return indexed(*args)
        return func(*args, **(kwargs or {}))


def indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    for i, part in enumerate(parts):
        if part is Ellipsis:
            parts[i : i + 1] = [slice(None)] * (x.dim() - sum(p is not None for p in parts) + 1)
            break
    dim, tensors = 0, []
    for part in parts:
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            x = aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        else:
            tensors += [None] * (dim - len(tensors)) + [part]
        dim += 1
    return aten.index.Tensor(x, tensors) if tensors else x


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode, torch.set_grad_enabled(CUDA_BUILD), IndexByOperators():
        yield mode


def on_cuda(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=CUDA)


def fake_policy(recipe: str, *args: str) -> tuple[Any, Policy]:
    """Make a recipe's configuration and three blocks of its policy, in bfloat16 as in FSDP's forward."""
    c = load_config([f"--recipe={recipe}", "--model.liger=false", *args])
    shape = shape_of(c.model)
    shape.num_hidden_layers, shape.layer_types = 3, shape.layer_types[:3]
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(on_cuda(p), requires_grad=CUDA_BUILD)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = on_cuda(b)
    policy = Policy(model, attention=Attention("torch's varlen_attn"), head_form=HeadForm())
    prepare_blocks(policy, c.model, CUDA)
    return c, policy


LENGTHS = (6000, 37, 1)  # tokens of responses


def fake_pack(mode: FakeTensorMode) -> Pack:
    with torch.utils._python_dispatch._disable_current_modes():
        pack = make_pack(range(3), [[1] * 5] * 3, [[2] * n for n in LENGTHS], [[-1.0] * n for n in LENGTHS],
                         torch.device("cpu"))  # fmt: skip
    there = {k: on_cuda(v) for k, v in vars(pack).items() if torch.is_tensor(v)}
    return dataclasses.replace(pack, **there)


@pytest.mark.parametrize("recipe, heads, kv_heads", [("lead-14b", 40, 8), ("lead-7b", 28, 4)])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_from_a_pack_to_its_loss_nothing_waits_for_the_device(recipe, heads, kv_heads, checkpointing, fake):
    c, policy = fake_policy(recipe, f"--model.activation_checkpointing={checkpointing}")
    pack, S = fake_pack(fake), c.rollout.problems * c.rollout.group_size
    o = Objective(torch.empty(S, device=CUDA), torch.empty(S, device=CUDA),
                  Groups(torch.empty(S, 4, device=CUDA), c.rollout.group_size))  # fmt: skip
    with NoWait() as watch:
        out = policy_loss(policy, pack, o, c)
        logprobs = pack_logprobs(policy, pack, c.rollout.temperature)
    rows = sum(LENGTHS)
    assert out.loss.is_cuda and out.loss.dtype == out.logprobs.dtype == logprobs.dtype == torch.float32
    assert out.logprobs.shape == logprobs.shape == (rows,) and all(m.is_cuda for m in out.metrics.values())
    attends = watch.calls("_varlen_attn.default")
    assert len(attends) == 2 * 3
    shared = "enable_gqa" in inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters
    for given in attends:
        assert given["query"].shape == (rows + 4 * 3, heads, 128) and given["query"].dtype == torch.bfloat16
        assert given["key"].shape[1] == (kv_heads if shared else heads)
        assert given["max_q"] == given["max_k"] == max(LENGTHS) + 4 == max(pack.lengths)
        assert given["cu_seq_q"] is pack.cu_seqlens and list(given["window_size"]) == [-1, 0]
    assert not watch.calls("scaled_dot_product")
    products = watch.calls("aten.mm.default") + watch.calls("aten.addmm.default")
    assert len(products) >= 2 * 3 * 7
    assert {x.dtype for given in products for x in given.values() if torch.is_tensor(x)} == {torch.bfloat16}
    (head,) = watch.calls("lead_kernels.linear_policy_loss")
    assert head["hidden"].shape == (rows, policy.model.config.hidden_size)
    assert head["hidden"].dtype == head["head"].dtype == torch.bfloat16 and head["head"].shape[0] == 152064


@pytest.fixture
def launchers(monkeypatch) -> list[str]:
    """Replace Triton's launchers by functions that return results without values; yields the names of those called."""
    kernels = pytest.importorskip("lead_kernels._triton_rows", reason="Triton is not installed")
    launched: list[str] = []

    def policy_rows(logits, tokens, sequences, terms, options, temperature, gradient, *more, **kw):
        launched.append("policy_rows")
        each = [logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3)]
        return *each, logits.new_empty(len(RowMetrics._fields), len(logits), dtype=torch.float32)

    def row_stats(logits, *more, **kw):
        launched.append("row_stats")
        return logits.new_empty(len(logits), 4, dtype=torch.float32)

    monkeypatch.setattr(kernels, "policy_rows_triton", policy_rows)
    monkeypatch.setattr(kernels, "row_stats_triton", row_stats)
    monkeypatch.setattr(_head, "adds_in_product", lambda device: True)  # normally tried on the device, once per process
    return launched


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_inside_the_heads_operators_nothing_waits_for_the_device(options, groups, fake, launchers):
    """Run the operators' own code, which a fake forward would replace, with chunks and Triton's launchers."""
    T, S = 21_000, 256
    hidden, head = (torch.empty(n, 5120, dtype=torch.bfloat16, device=CUDA) for n in (T, 152064))
    long, row = (torch.empty(T, dtype=t, device=CUDA) for t in (torch.int64, torch.float32))
    tokens = Tokens(long, long.int(), row, row, row)
    given = torch.empty(S, device=CUDA)
    each = Groups(Outcomes(given, given), 8) if groups else given
    with NoWait() as watch:
        linear_policy_loss(hidden, head, tokens, Sequences(given, each), options, temperature=0.6)
        linear_logprobs(hidden, head, long, temperature=0.6)
        (loss_call,), (logprobs_call,) = map(watch.calls, ("kernels.linear_policy_loss", "kernels.linear_logprobs"))
        plan = [loss_call["plan"][0], 1, 1, 0, 0]
        loss, *_, d_hidden, d_head, _ = linear_policy_loss_op._init_fn(**loss_call | {"plan": plan})
        linear_logprobs_op._init_fn(**logprobs_call)
    rows = _head.chunk_size(T, head, None)
    chunks = -(-T // rows)
    assert chunks == 3 and launchers.count("policy_rows") == chunks
    assert launchers.count("row_stats") == chunks * (1 + needs_first_pass(options))
    assert loss.dtype == torch.float32 and d_hidden.shape == hidden.shape and d_head.shape == head.shape
    added = [given for name, given in watch.seen if "addmm" in name and given["self"].shape == head.shape]
    assert len(added) == chunks and all(given["self"].dtype == torch.float32 for given in added)


@pytest.mark.parametrize("wait", ["item", "tolist", "bool", "nonzero", "cpu", "mask"])
def test_what_waits_is_noticed(wait, fake):
    x = torch.ones(1, device=CUDA)
    calls = {"bool": lambda: bool(x), "mask": lambda: x[x > 0]}
    call = calls.get(wait) or getattr(x, wait)
    noticed = (AssertionError, RuntimeError)  # a CPU build refuses some of them before they are dispatched
    with pytest.raises(noticed, match="waits for|brings a tensor|not linked with support for cuda"), NoWait():
        call()


def test_a_packs_lengths_are_on_the_host():
    pack = make_pack([0, 2], [[1, 1]] * 3, [[2] * 3, [2], [2] * 5], None, torch.device("cpu"))
    assert pack.lengths == [4, 6] == pack.cu_seqlens.diff().tolist()
    part = make_pack([0, 2], [[1, 1]] * 3, [[2] * 3, [2], [2] * 5], None, torch.device("cpu"), (1, 4))
    assert part.lengths == [4, 6, 2] == part.cu_seqlens.diff().tolist()
    assert make_pack([], [], [], None, torch.device("cpu")).lengths == [1]
