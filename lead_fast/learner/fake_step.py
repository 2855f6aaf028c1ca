"""One pack of the real trainer on tensors without memory: bytes in use, work and traffic are counted.

The trainer's own model, sharding, optimiser and loss run under FakeTensorMode in a fake process group of any size: its
tensors have shapes and no memory. FSDPMemTracker adds up what would be in memory; a second mode counts collectives,
FLOPs and bytes. Two small depths are run, and every number is extrapolated to the model's depth: with equal blocks it
is a straight line in their number (tests/test_plan.py). Every sequence has its own prompt, as in bfloat16 on a GPU;
packs that share prompts (packing.py) need less.

Two things differ from a GPU and are corrected here. Attention is an operator that holds what flash-attn's does (q, k,
v, out and the log-sum-exp; in the backward a float32 accumulator of d(q)), as there is no CUDA to trace. Operators that
are opaque to tracing (the head's kernel, attention's backward) get the buffers that they allocate inside added.
Legend: S sequences, T packed tokens, R rows of the head, D hidden, V vocabulary, H heads, K head dim.
"""

import contextlib
import copy
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM

from lead_kernels import LossOptions
from lead_kernels._head import CHUNK_BYTES

from ..config import Config
from ..runtime.ranks import Ranks
from .attention import attention_groups, packed_attention
from .fake_blocks import fused_blocks
from .head import HeadForm
from .loss import Objective, policy_loss
from .optimizer import make_optimizer
from .packing import Pack
from .policy import Policy, shard
from .weights import gathered_weights

Numbers = dict[str, float]


# ----------------------------------------------------------------------------------------------------------- attention


@torch.library.custom_op("lead_fast::flash_attn_plan", mutates_args=())
def flash_plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of flash attention: q [T, H, K], k and v [T, kv heads, K] -> out [T, H, K], log-sum-exp [H, T]."""
    raise NotImplementedError("only shapes")


@flash_plan.register_fake
def _(q, k, v):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("lead_fast::flash_attn_plan_backward", mutates_args=())
def flash_plan_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError("only shapes")


@flash_plan_backward.register_fake
def _(grad, q, k, v, out, lse):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


flash_plan.register_autograd(
    lambda ctx, grad, _: flash_plan_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def plan_attention(lengths: Sequence[int], on_gpu: bool) -> Callable:
    """packed_attention for tensors without values: flash attention, or (not `on_gpu`) itself."""

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kw):
        if on_gpu:
            q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
            return flash_plan(q, k, v)[0][None], None
        index = []  # places in as many as a mask has true values, which a fake tensor cannot count
        for (where, real), group in zip(kw.pop("sdpa_index"), attention_groups(list(lengths)), strict=True):
            place = where.new_empty(sum(lengths[i] for i in group))
            index.append((where, (place, place)))
            del real
        kw["sdpa_index"] = index
        return packed_attention(module, query, key, value, attention_mask, dropout, scaling, **kw)

    return attend


# ------------------------------------------------------------------------------------------------------------ tracking


HEAD = "Head"  # a kind of memory of its own: chunk of logits, d(head), d(hidden) of the rows
KINDS = {
    "parameters": (_FSDPRefType.SHARDED_PARAM,),
    "gathered parameters": (_FSDPRefType.UNSHARDED_PARAM, _FSDPRefType.ALL_GATHER),
    "gradients": (_FSDPRefType.SHARDED_GRAD, _FSDPRefType.UNSHARDED_GRAD, _FSDPRefType.REDUCE_SCATTER),
    "optimiser": (_FSDPRefType.OPT,),
    "activations": (_FSDPRefType.ACT, _FSDPRefType.TEMP, _FSDPRefType.BUFFER, _FSDPRefType.INP),
    "head": (HEAD,),
}
SEGMENTS = ("forward", "blocks' backward", "end of backward")
COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: "all_gather",
    torch.ops.c10d._reduce_scatter_base_.default: "reduce_scatter",
    torch.ops.c10d.allreduce_.default: "all_reduce",
}
HEAD_OP = torch.ops.lead_kernels.linear_policy_loss.default
ATTENTION = {
    torch.ops.lead_fast.flash_attn_plan.default: "attention_forward",
    torch.ops.lead_fast.flash_attn_plan_backward.default: "attention_backward",
}


class Tracker(FSDPMemTracker):
    """Track the most memory of each kind in each of SEGMENTS, bytes.

    A peak over the whole step need not be a straight line in the number of blocks: the highest moment may change.
    Within a segment it is one from three blocks on: forward and the blocks' backward are highest when all blocks have
    saved what they save, and the end (embedding and head are reduced) comes when all are done.
    """

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer, on_gpu: bool):
        super().__init__(policy, optimizer)
        self._ref_class = [*_FSDPRefType, HEAD]  # type: ignore[assignment]
        self.on_gpu = on_gpu
        self.chunk_bytes = CHUNK_BYTES["cuda" if on_gpu else "cpu"]
        self.blocks_left = len(policy.model.model.layers)
        self.held: torch.Tensor | None = None
        self.peaks: dict[str, dict[str, int]] = {s: {"Total": 0} for s in SEGMENTS}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor and self._is_head(args[0]):
            return args[0]  # the backward of the head scales in place, which it does not do to traced tensors
        inside = self._inside(func, args)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is HEAD_OP:
            for grad in out[4:]:
                self._update_and_maybe_create_winfos(grad, HEAD)  # type: ignore[arg-type]
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.blocks_left -= 1
            self.held = args[1] if self.on_gpu else None  # its stream may still read it while the next one is filled
        at = SEGMENTS[0 if not self._mod_tracker.is_bw else 1 if self.blocks_left > 0 else 2]
        now = next(iter(self._curr_mem_snap.values()))
        if now["Total"] > self.peaks[at]["Total"]:  # type: ignore[index]
            self.peaks[at] = {str(getattr(k, "value", k)): v for k, v in now.items()}
        del inside
        return out

    def _is_head(self, x: Any) -> bool:
        known = isinstance(x, torch.Tensor) and self._WINFO.get(x.untyped_storage())
        return bool(known) and known[0].reftype == HEAD

    def _inside(self, func: Any, args: tuple) -> list[torch.Tensor]:
        """Allocate what an operator allocates inside, to be held while it is counted."""
        inside, kind = [], HEAD
        if func is HEAD_OP:
            (hidden, head), (logits, _, trained) = args[:2], head_work(args)
            rows = max(1, min(hidden.shape[0], self.chunk_bytes // (head.shape[0] * logits.itemsize)))
            inside = [torch.empty(rows, head.shape[0], dtype=logits)]
            if logits != head.dtype:  # their gradient, rounded for its products
                inside.append(torch.empty(rows, head.shape[0], dtype=head.dtype))
            if head.dtype == torch.bfloat16 and trained:  # d(head) is added up in float32
                inside.append(torch.empty(head.shape, dtype=torch.float32))
        elif ATTENTION.get(func) == "attention_backward":
            kind = _FSDPRefType.TEMP
            inside = [torch.empty(args[1].shape, dtype=torch.float32), torch.empty_like(args[5])]
        for x in inside:
            self._update_and_maybe_create_winfos(x, kind)  # type: ignore[arg-type]
        return inside


def head_work(args: tuple) -> tuple[torch.dtype, int, int]:
    """Read from a call of HEAD_OP the logits' dtype and whether (1 or 0) hidden states and head get a gradient."""
    head, options, (_, hidden_trained, head_trained, *_) = args[1], LossOptions.decode(args[-2])[0], args[-1]
    wide = torch.promote_types(head.dtype, torch.float32)
    return wide if options.fp32_logits else head.dtype, hidden_trained, head_trained


class Counter(TorchDispatchMode):
    """Count collectives (calls, bytes of whole tensors, largest), FLOPs of products, attention calls, other bytes."""

    def __init__(self):
        super().__init__()
        self.counts: Tally[str] = Tally()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim" or func is torch.ops.aten._unsafe_view.default:
            return out  # a question about a tensor, and a view that does not say so: neither moves a byte
        if name := COLLECTIVES.get(func):
            tensors = args[0] if isinstance(args[0], list) else args[:2]
            size = max(x.numel() * x.element_size() for x in tensors)
            self.counts[f"{name}_calls"] += 1
            self.counts[f"{name}_bytes"] += size
            self.counts[f"{name}_largest"] = max(size, self.counts[f"{name}_largest"])
        elif func is HEAD_OP:
            (hidden, head), (logits, *trained) = args[:2], head_work(args)
            self.counts["gemm_flops"] += 2 * (1 + sum(trained)) * hidden.numel() * head.shape[0]
            # rows of logits are read twice and their gradient is written once, chunk by chunk, and rounded
            rounded = logits.itemsize + head.element_size() if logits != head.dtype else 0
            self.counts["moved_bytes"] += hidden.shape[0] * head.shape[0] * (3 * logits.itemsize + rounded)
        elif name := ATTENTION.get(func):
            self.counts[f"{name}_calls"] += 1
        elif func._overloadpacket in flop_registry:
            self.counts["gemm_flops"] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            flat = tree_leaves((args, kwargs, out if "empty" not in str(func) else None))
            self.counts["moved_bytes"] += sum(x.numel() * x.element_size() for x in flat if torch.is_tensor(x))
        return out


class FakePolicy(Policy):
    def to(self, *args: Any, **kwargs: Any) -> "FakePolicy":
        return self  # nothing to move, and fake parameters cannot be swapped


@contextlib.contextmanager
def fake_job(gpus: int, replicate: int) -> Iterator[Ranks]:
    """Yield rank 0 of a job of `gpus` without any communication, with the trainer's mesh."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        shape, names = (
            ((replicate, gpus // replicate), ("replicate", "shard")) if replicate > 1 else ((gpus,), ("shard",))
        )
        yield Ranks(0, gpus, torch.device("cpu"), init_device_mesh("cpu", shape, mesh_dim_names=names))
    finally:
        dist.destroy_process_group()


def run_pack(c: Config, shape: Any, ranks: Ranks, lengths: Sequence[int], rows: int, on_gpu: bool) -> Numbers:
    """Run forward and backward of one pack as after a run's first step: gradients and AdamW's state exist.

    Args:
        c, shape: the configuration and the model's.
        lengths, rows: tokens of the pack's sequences, and rows of the head.
        on_gpu: whether attention and chunks are as on a GPU or as on a CPU.
    Returns:
        bytes under "<segment>/<kind>", counts under the Counter's names, sync_bytes (the weight sync's all-gathers),
        parameters, and the forward's FLOPs of a sequence of one and of two tokens.

    The update is not tracked: clipping and fused AdamW work in place.
    """
    AttentionInterface.register("lead_plan", plan_attention(lengths, on_gpu))
    with FakeTensorMode(), contextlib.ExitStack() as patched:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        if on_gpu and c.model.liger:
            patched.enter_context(fused_blocks(model))
        if c.model.freeze_head:
            model.lm_head.requires_grad_(False)
        policy = FakePolicy(model, head_form=HeadForm())  # a probe wants values; scale and cap cost no memory
        policy.model.set_attn_implementation("lead_plan")
        shard(policy, ranks, c.model, c.parallel)
        optimizer = make_optimizer(policy, c.optim)
        for p in policy.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        optimizer.step()
        T = sum(lengths)
        long, S = torch.zeros(T, dtype=torch.int64), c.rollout.problems * c.rollout.group_size
        row, cu = torch.zeros(rows, dtype=torch.int64), torch.zeros(len(lengths) + 1, dtype=torch.int32)
        pack = Pack(long, long, cu, row, row, row.int(), row.float(), list(lengths))
        o = Objective(torch.zeros(S), torch.zeros(S))
        with Counter() as synced:
            for _ in gathered_weights(policy, getattr(torch, c.model.dtype), c.rollout.sync_bucket_mib << 20):
                pass
        tracker = Tracker(policy, optimizer, on_gpu)
        with tracker, Counter() as counter:
            policy_loss(policy, pack, o, c, reference_R=pack.behavior_R if c.loss.kl_coef else None).loss.backward()
    out = {"parameters": sum(p.numel() for p in policy.parameters())}
    out |= {f"forward_flops_{n}": policy.flops()(n) for n in (1, 2)}
    out |= dict(counter.counts) | {"sync_bytes": synced.counts["all_gather_bytes"]}
    for segment, peak in tracker.peaks.items():
        out |= {f"{segment}/{name}": sum(peak.get(str(getattr(k, "value", k)), 0) for k in kinds)
                for name, kinds in KINDS.items()}  # fmt: skip
    return {k: float(v) for k, v in out.items()}


DEPTHS = (3, 4)  # tracked blocks


def track(c: Config, shape: Any, ranks: Ranks, lengths: Sequence[int], rows: int, on_gpu: bool = True) -> Numbers:
    """Do `run_pack` at the model's depth, extrapolated from DEPTHS if it is deeper; arguments as there."""

    def at(depth: int) -> Numbers:
        cut = copy.deepcopy(shape)
        cut.num_hidden_layers = depth
        if getattr(cut, "layer_types", None):
            cut.layer_types = cut.layer_types[:depth]
        return run_pack(c, cut, ranks, lengths, rows, on_gpu)

    depth = shape.num_hidden_layers
    return at(depth) if depth <= max(DEPTHS) else line((DEPTHS[0], at(DEPTHS[0])), (DEPTHS[1], at(DEPTHS[1])), depth)


def line(a: tuple[float, Numbers], b: tuple[float, Numbers], x: float) -> Numbers:
    """Every number at x, on the straight line through those at a[0] and b[0]."""
    share = (x - a[0]) / (b[0] - a[0])
    return {k: a[1].get(k, 0.0) + share * (b[1].get(k, 0.0) - a[1].get(k, 0.0)) for k in a[1] | b[1]}
