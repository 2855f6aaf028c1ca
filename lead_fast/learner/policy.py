"""The policy: a transformers causal language model run on packed sequences, sharded by FSDP2.

Legend: T packed tokens, R rows that predict a response token, D hidden, V vocabulary, H heads, K head dim.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..config import ModelConfig, ParallelConfig
from ..runtime.ranks import Ranks
from .attention import Attention, choose, sdpa_index, take
from .head import Head, HeadForm, probe_head
from .load import Fill, open_model
from .model import head_dim
from .packing import Pack, flops_per_sequence

# ------------------------------------------------------------------------------------------------------------- policy


class Policy(nn.Module):
    """A causal language model whose forward goes from a pack to the hidden states of its response rows to a loss.

    The head's weight is handed to the loss as it is inside the forward, where FSDP has gathered it: the loss kernel
    multiplies by it chunk by chunk, and no complete matrix of logits exists.

    Args:
        model: a causal language model with blocks in `model.model.layers` and a linear `lm_head`.
        sequence_group: ranks that share each pack.
        offload: keep what the backward needs in host memory.
        attention: who computes attention on a GPU in half precision.
        head_form: what the model does to its head's product; None: find out by the model's own forward.
    Raises:
        ValueError: the model does to its head's product what is not applied here.
    """

    def __init__(
        self,
        model: Any,
        *,
        sequence_group: dist.ProcessGroup | None = None,
        offload: bool = False,
        attention: Attention | None = None,
        head_form: HeadForm | None = None,
    ):
        super().__init__()
        self.head_form = head_form or probe_head(model)
        self.attention = attention or Attention("torch's varlen_attn")
        self.sequence_group = sequence_group
        self.offload = offload
        self.shares_prompts = False  # make_policy sets it where attention is plain torch, which reads Pack.prefixes
        model.config.use_cache = False
        model.set_attn_implementation("lead_packed")
        self.model = model

    def forward(self, pack: Pack, head: Callable[[torch.Tensor, Head], Any]) -> Any:
        """Call `head(hidden_RD, Head)` with the pack's response rows, inside FSDP's hooks, and return its result.

        With a sequence group the pack is this rank's part of one (make_pack's `part`); attention sees all of it.
        """
        lengths = pack.lengths
        device = pack.input_ids_T.device
        kw: dict[str, Any] = {}
        if device.type == "cpu" or next(self.parameters()).dtype == torch.float32:
            kw["sdpa_index"] = sdpa_index(lengths, device, pack.prefixes)
        else:
            assert not pack.prefixes, "varlen attention has no prefixes"
            kw |= {"cu_seq_lens_q": pack.cu_seqlens, "cu_seq_lens_k": pack.cu_seqlens}
            kw |= {"max_length_q": max(lengths), "max_length_k": max(lengths), "implementation": self.attention}
        if self.sequence_group:
            kw["sequence_group"] = self.sequence_group
        pinned = partial(torch.autograd.graph.save_on_cpu, pin_memory=device.type == "cuda")
        with pinned() if self.offload and self.training else contextlib.nullcontext():
            hidden_TD = self.model.model(
                input_ids=pack.input_ids_T[None],
                position_ids=pack.position_ids_T[None],
                attention_mask=None,
                use_cache=False,
                **kw,
            ).last_hidden_state[0]
        last = self.model.lm_head
        return head(take(hidden_TD, pack.rows_R), Head(last.weight, last.bias, self.head_form))

    def to_shards(self) -> None:
        """Free the gathered weights: from here on `parameters()` are the shards, which hold the gradients."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def flops(self) -> Callable[[int], float]:
        """Forward FLOPs of a sequence of n tokens."""
        c = self.model.config
        blocks = sum(p.numel() for n, p in self.model.named_parameters() if ".layers." in n and p.dim() == 2)
        return flops_per_sequence(blocks + c.vocab_size * c.hidden_size, c.num_hidden_layers, c.hidden_size)


KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}

"""What selective checkpointing does not compute again; flash-attn's and varlen_attn's operators are known by name."""


def _keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    attention = any(word in str(op) for word in ("flash_attn", "varlen_attn"))
    return CheckpointPolicy.MUST_SAVE if op in KEPT or attention else CheckpointPolicy.PREFER_RECOMPUTE


def shard(
    policy: Policy,
    ranks: Ranks,
    model: ModelConfig,
    parallel: ParallelConfig,
    fill: Fill | None = None,
) -> Policy:
    """Wrap every block and the model in FSDP2: fp32 masters, compute in `dtype`, reduction in fp32, sums not means.

    Gradients are summed over ranks, not averaged: the loss already carries its global denominators. The order is
    compilation, checkpointing, sharding. Embedding, last norm and head are the outermost unit: gathered once per pack
    (once per step without reshard) for all chunks of the head. `fill` loads the weights of a unit that is on the meta
    device just before it is sharded.
    """
    in_host_memory = parallel.offload in ("optimizer", "both")
    if not in_host_memory and not fill:
        policy.to(ranks.device)
    fill = fill or (lambda module: None)
    blocks = prepare_blocks(policy, model, ranks.device)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)  # outputs stay as they are
    precision = half if model.dtype == "bfloat16" else MixedPrecisionPolicy()
    where: dict[str, Any] = {"mesh": ranks.mesh, "mp_policy": precision}
    pin = ranks.device.type == "cuda"
    where["offload_policy"] = CPUOffloadPolicy(pin_memory=pin) if in_host_memory else OffloadPolicy()
    for block in blocks:
        fill(block)
        fully_shard(block, reshard_after_forward=parallel.reshard, **where)
    fill(policy)
    fully_shard(policy, reshard_after_forward=False, **where)
    for block, following in zip(blocks, blocks[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            if ranks.world > 1:  # one rank alone would divide all by 1, in a tensor of its own
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # NVLS refuses NCCL's PREMUL_SUM, gloo has none
            module.set_reshard_after_backward(parallel.reshard)
    return policy


def prepare_blocks(policy: Policy, model: ModelConfig, device: torch.device) -> list[Any]:
    """Put Liger's kernels, compilation and checkpointing into the policy's blocks as `model` says; return them."""
    blocks = list(policy.model.model.layers)
    if uses_liger(model.liger, device):
        _patch_by_liger(policy.model, copy_rope_inputs=model.activation_checkpointing == "selective")
    for block in blocks:
        if model.compile:
            block.forward = torch.compile(block.forward, dynamic=True)
        if model.activation_checkpointing != "none":  # around forward, not the module: FSDP's hooks must not run again
            kw: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if model.activation_checkpointing == "selective":
                kw["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
            block.forward = partial(checkpoint, block.forward, **kw)
    return blocks


def uses_liger(asked: bool, device: torch.device) -> bool:
    """Whether the blocks' RMSNorm, RoPE and SwiGLU are Liger's: where asked for (model.liger), on a GPU."""
    return asked and device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def blocks_in_use(asked: bool, device: torch.device) -> str:
    """Name what computes the blocks' RMSNorm, RoPE and SwiGLU on a GPU."""
    if uses_liger(asked, device):
        return f"Liger {importlib.metadata.version('liger-kernel')}"
    return f"torch ({'liger-kernel is not installed' if asked else 'model.liger is false'})"


def _patch_by_liger(model: Any, *, copy_rope_inputs: bool) -> None:
    """Replace the model's RMSNorm, RoPE and SwiGLU by Liger's.

    Args:
        copy_rope_inputs: needed by selective checkpointing, which keeps the projections' outputs: Liger rotates queries
            and keys in place, unseen by torch, and the backward pass would rotate them again.

    A model whose type Liger has no kernels for stays as it is, and a line says so.
    """
    from liger_kernel.backends import set_impl  # type: ignore
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # type: ignore

    set_impl("nvidia-triton")  # beside vLLM's cutlass-dsl Liger would choose its CuTe kernels, not measured here
    parts = {"rope": True, "rms_norm": True, "swiglu": True}
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model, **parts, **losses)
    if not any(_by_liger(getattr(m, "forward", None)) for m in model.modules()) and os.environ.get("RANK", "0") == "0":
        kind = model.config.model_type
        print(f"Liger has no kernels for model type {kind}: its RMSNorm, RoPE and SwiGLU are torch's.", flush=True)
    code = sys.modules[type(model).__module__]
    for name, function in [*vars(code).items()]:
        if copy_rope_inputs and _by_liger(function) and "rotary" in function.__name__:
            setattr(code, name, _on_copies(function))


def _by_liger(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("liger_kernel.")


def _on_copies(rope: Callable[..., Any]) -> Callable[..., Any]:
    """`rope` on copies of queries and keys, laid out in memory as they are."""

    def rotated(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return rope(q.clone(), k.clone(), *args, **kwargs)

    return rotated


def load_policy(model: ModelConfig, parallel: ParallelConfig, ranks: Ranks) -> Policy:
    """Load and shard the policy, ready to train.

    Raises:
        ValueError: the model cannot be loaded, or has heads that parallel.sequence ranks cannot share.
    """
    device = torch.device("cpu") if parallel.offload in ("optimizer", "both") else ranks.device
    return make_policy(*open_model(model, ranks, device), model, parallel, ranks)


def make_policy(network: Any, fill: Fill | None, model: ModelConfig, parallel: ParallelConfig, ranks: Ranks) -> Policy:
    """Do the same with a loaded causal language model in float32, or one on the meta device and the `fill` for it.

    Raises:
        ValueError: the model has heads that parallel.sequence ranks cannot share, or needs what this GPU's
            implementation of attention cannot do.
    """
    heads, n = network.config.num_attention_heads, parallel.sequence
    if heads % n:
        raise ValueError(f"parallel.sequence is {n}, and {model.path} has {heads} attention heads: give a divisor.")
    offload = parallel.offload in ("activations", "both")
    if model.freeze_head:
        network.lm_head.requires_grad_(False)
    attention = None
    if ranks.device.type == "cuda" and model.dtype != "float32":
        capped = getattr(network.config, "attn_logit_softcapping", None) is not None
        attention = choose(torch.cuda.get_device_capability(ranks.device), head_dim(network.config), capped)
    group = ranks.sequence_group if n > 1 else None
    policy = Policy(network, sequence_group=group, offload=offload, attention=attention)
    policy.shares_prompts = attention is None and not model.unchecked  # unchecked layers may mix tokens in other ways
    return shard(policy, ranks, model, parallel, fill)
