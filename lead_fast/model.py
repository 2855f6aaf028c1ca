"""The policy: a transformers causal language model run on packed sequences, sharded by FSDP2.

Legend: T packed tokens, R rows that predict a response token, D hidden, V vocabulary, H heads, K head dim.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from .attention import Attention, choose, varlen_attention
from .config import ModelConfig, ParallelConfig
from .distributed import Ranks
from .packing import Pack, flops_per_sequence

EMBEDDED = {"tiny": Path(__file__).parent / "assets" / "tiny"}


def resolve(path: str) -> str:
    """Folder or hub name of a model: the embedded ones by name, a run directory by its exported final model."""
    if path in EMBEDDED:
        return str(EMBEDDED[path])
    for folder in (Path(path) / "final", Path(path)):
        if (folder / "config.json").is_file() and "model_type" in json.loads((folder / "config.json").read_text()):
            return str(folder)
    if Path(path).exists():
        raise ValueError(
            f"model.path {path} holds no model (no config.json with a model_type): give a folder that does."
        )
    return path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ValueError if it cannot be had, or has no chat template."""
    path = resolve(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"No tokenizer for model.path {config.path}: give a local folder or a hub name ({reason})"
        ) from e
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {config.path} has no chat template: add chat_template.jinja to its folder.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_shape(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration, without its weights. Raises ValueError if it cannot be had."""
    try:
        return AutoConfig.from_pretrained(resolve(config.path), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"model.path {config.path} has no configuration that can be read: give a local folder or a hub name "
            f"({reason})"
        ) from e


def head_dim(shape: PretrainedConfig) -> int:
    """Dimension of an attention head."""
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def load_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model in `dtype` on the CPU, from safetensors only."""
    path = resolve(config.path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"model.path {config.path} cannot be loaded: give a local folder or a hub name ({reason})"
        ) from e
    if not (hasattr(model, "lm_head") and hasattr(getattr(model, "model", None), "layers")):
        raise ValueError(
            f"model.path {config.path} is of type {model.config.model_type}, whose blocks and head are not where the "
            "trainer looks: give a model of the Llama kind (Llama, Qwen2, Qwen3, Mistral, ...)."
        )
    return model


# ---------------------------------------------------------------------------------------------------------- attention


def attention_groups(lengths: list[int], waste: float = 0.25) -> list[list[int]]:
    """Sequences of similar length together, so that padding them to the longest wastes at most `waste`."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] >= (1 - waste) * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def sdpa_index(lengths: list[int], device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each group of similar lengths: the packed position of every (sequence, slot), and which slots are real.

    A slot behind a sequence's end points at the sequence's first token and is thrown away; attention being causal,
    no real token ever looks at it.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)
    out = []
    for group in attention_groups(lengths):
        longest = max(lengths[i] for i in group)
        slot = torch.arange(longest)
        real = slot[None] < torch.tensor([lengths[i] for i in group])[:, None]
        where = torch.where(real, starts[group][:, None] + slot[None], starts[group][:, None])
        out.append((where.to(device), real.to(device)))
    return out


class _Exchange(torch.autograd.Function):
    """x [n, ...]: part i goes to the group's rank i, and part i of the result came from it; so does the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grads[0].contiguous(), ctx.group), None


def tokens_to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[1, H, T/n, K], a rank's tokens of all heads -> [1, H/n, T, K], all tokens of a rank's heads (Ulysses)."""
    n, (_, H, part, K) = group.size(), x.shape
    parts = _Exchange.apply(x.reshape(n, H // n, part, K).contiguous(), group)
    return parts.transpose(0, 1).reshape(1, H // n, n * part, K)


def heads_to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[1, T, H/n, K] -> [1, T/n, H, K], the way back."""
    n, (_, T, mine, K) = group.size(), x.shape
    parts = _Exchange.apply(x.reshape(n, T // n, mine, K).contiguous(), group)
    return parts.transpose(0, 1).reshape(1, T // n, n * mine, K)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each packed sequence.

    query [1, H, T, K], key and value [1, kv heads, T, K] -> [1, T, H, K]. On CUDA in half precision as attention.py
    chose; elsewhere SDPA over sequences of similar length. Ranks that share a pack (`sequence_group`) come with their
    tokens of all heads, and look at all tokens for their heads.
    """
    assert attention_mask is None and query.shape[0] == 1
    if group := kwargs.pop("sequence_group", None):
        copies = _copies(query.shape[1], key.shape[1], group.size())
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        query, key, value = (tokens_to_heads(x, group) for x in (query, key, value))
        return heads_to_tokens(_attend(query, key, value, scaling, **kwargs), group), None
    return _attend(query, key, value, scaling, **kwargs), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, **kwargs: Any
) -> torch.Tensor:
    if "sdpa_index" not in kwargs:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, heads, K]
        cu, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        return varlen_attention(q, k, v, cu, longest, scaling, kwargs["implementation"])[None]
    out = torch.empty_like(query[0].transpose(0, 1))  # [T, H, K]
    gqa = key.shape[1] != query.shape[1]
    for where, real in kwargs["sdpa_index"]:
        q, k, v = (x[0][:, where].transpose(0, 1) for x in (query, key, value))  # [sequences, heads, slots, K]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        out = out.index_put((where[real],), o.transpose(1, 2)[real])
    return out[None]


def _copies(heads: int, kv_heads: int, ranks: int) -> int:
    """How often key and value heads must be repeated so that every rank gets whole ones, next to their query heads."""
    return next(n for n in range(1, heads // kv_heads + 1) if heads % (n * kv_heads) == 0 == n * kv_heads % ranks)


AttentionInterface.register("lead_packed", torch.compiler.disable(packed_attention))  # type: ignore


# ------------------------------------------------------------------------------------------------------------- policy


class Policy(nn.Module):
    """A causal language model whose forward goes from a pack to the hidden states of its response rows to a loss.

    The head's weight is handed to the loss as it is inside the forward, where FSDP has gathered it: the loss kernel
    multiplies by it chunk by chunk, and no matrix of logits is ever whole.
    """

    def __init__(
        self,
        model: Any,
        *,
        sequence_group: dist.ProcessGroup | None = None,
        offload: bool = False,
        attention: Attention | None = None,
    ):
        super().__init__()
        self.attention = attention or Attention("torch's varlen_attn")
        self.sequence_group = sequence_group
        self.offload = offload
        model.config.use_cache = False
        model.set_attn_implementation("lead_packed")
        self.model = model

    def forward(self, pack: Pack, head: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        """`head(hidden_RD, head_weight_VD)` of the pack's response rows, inside FSDP's hooks.

        With a sequence group the pack is this rank's part of one (make_pack's `part`), attention sees the whole.
        """
        lengths = pack.lengths
        device = pack.input_ids_T.device
        kw: dict[str, Any] = {}
        if device.type == "cpu" or next(self.parameters()).dtype == torch.float32:
            kw["sdpa_index"] = sdpa_index(lengths, device)
        else:
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
        return head(hidden_TD[pack.rows_R], self.model.lm_head.weight)

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


def shard(policy: Policy, ranks: Ranks, model: ModelConfig, parallel: ParallelConfig) -> Policy:
    """FSDP2 around every block and the whole: fp32 masters, compute in `dtype`, reduction in fp32, sums not means.

    Gradients are summed over ranks, not averaged: the loss already carries its global denominators. The order is
    compilation, checkpointing, sharding. Embedding, last norm and head are the outermost unit: gathered once a pack (or
    once a step without reshard) and there for all chunks of the head.
    """
    in_host_memory = parallel.offload in ("optimizer", "both")
    if not in_host_memory:
        policy.to(ranks.device)
    blocks = prepare_blocks(policy, model, ranks.device)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)  # outputs stay as they are
    precision = half if model.dtype == "bfloat16" else MixedPrecisionPolicy()
    where: dict[str, Any] = {"mesh": ranks.mesh, "mp_policy": precision}
    pin = ranks.device.type == "cuda"
    where["offload_policy"] = CPUOffloadPolicy(pin_memory=pin) if in_host_memory else OffloadPolicy()
    for block in blocks:
        fully_shard(block, reshard_after_forward=parallel.reshard, **where)
    fully_shard(policy, reshard_after_forward=False, **where)
    for block, following in zip(blocks, blocks[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if ranks.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)
            module.set_reshard_after_backward(parallel.reshard)
    return policy


def prepare_blocks(policy: Policy, model: ModelConfig, device: torch.device) -> list[Any]:
    """The policy's blocks with Liger's parts, compiled and checkpointed as `model` says."""
    blocks = list(policy.model.model.layers)
    if uses_liger(model.liger, device):
        _patch_by_liger(policy.model)
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
    """In words, who computes the blocks' RMSNorm, RoPE and SwiGLU on a GPU."""
    if uses_liger(asked, device):
        return f"Liger {importlib.metadata.version('liger-kernel')}"
    return f"torch ({'liger-kernel is not installed' if asked else 'model.liger is false'})"


def _patch_by_liger(model: nn.Module) -> None:
    # Beside vLLM's cutlass-dsl Liger would choose its CuTe kernels by itself, which nobody has measured here.
    os.environ.setdefault("LIGER_KERNEL_IMPL", "nvidia-triton")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # type: ignore

    parts = {"rope": True, "rms_norm": True, "swiglu": True}
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model, **parts, **losses)


def load_policy(model: ModelConfig, parallel: ParallelConfig, ranks: Ranks) -> Policy:
    """The sharded policy, ready to train.

    Raises:
        ValueError: the model cannot be loaded, or has heads that parallel.sequence ranks cannot share.
    """
    return make_policy(load_model(model), model, parallel, ranks)


def make_policy(whole: Any, model: ModelConfig, parallel: ParallelConfig, ranks: Ranks) -> Policy:
    """The same from a causal language model that is at hand, whole and in float32."""
    heads, n = whole.config.num_attention_heads, parallel.sequence
    if heads % n:
        raise ValueError(f"parallel.sequence is {n}, and {model.path} has {heads} attention heads: give a divisor.")
    offload = parallel.offload in ("activations", "both")
    attention = None
    if ranks.device.type == "cuda" and model.dtype != "float32":
        attention = choose(torch.cuda.get_device_capability(ranks.device), head_dim(whole.config))
    group = ranks.sequence_group if n > 1 else None
    policy = Policy(whole, sequence_group=group, offload=offload, attention=attention)
    return shard(policy, ranks, model, parallel)
