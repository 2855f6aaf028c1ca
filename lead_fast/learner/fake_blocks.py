"""Shape-only versions of Liger's RMSNorm, RoPE and SwiGLU, to count memory and bytes (fake_step.py).

Each reads its inputs once, writes its outputs once, and saves for the backward pass what Liger's kernel saves. Liger
itself needs Triton and a GPU, and its kernels are not operators that a dispatch mode could see.
Legend: T packed tokens, D hidden, F intermediate, H heads, K head dim.
"""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch


@torch.library.custom_op("lead_fast::fused_norm", mutates_args=())
def fused_norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of RMSNorm: x [1, T, D] -> y like x, reciprocal root mean squares [T] in float32."""
    raise NotImplementedError("only shapes")


@fused_norm.register_fake
def _(x, weight):
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("lead_fast::fused_norm_backward", mutates_args=())
def fused_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("only shapes")


@fused_norm_backward.register_fake
def _(grad, x, weight, rstd):
    return torch.empty_like(x), torch.empty_like(weight)


@torch.library.custom_op("lead_fast::fused_swiglu", mutates_args=())
def fused_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Shapes of silu(gate) * up, all [1, T, F]."""
    raise NotImplementedError("only shapes")


@fused_swiglu.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@torch.library.custom_op("lead_fast::fused_swiglu_backward", mutates_args=())
def fused_swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("only shapes")


@fused_swiglu_backward.register_fake
def _(grad, gate, up):
    return torch.empty_like(gate), torch.empty_like(up)


@torch.library.custom_op("lead_fast::fused_rope", mutates_args=())
def fused_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of RoPE: q [1, H, T, K] and k [1, kv heads, T, K], turned by cos and sin [1, T, K]."""
    raise NotImplementedError("only shapes")


@fused_rope.register_fake
def _(q, k, cos, sin):
    return torch.empty_like(q), torch.empty_like(k)


fused_norm.register_autograd(
    lambda ctx, grad, _: fused_norm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
)
fused_swiglu.register_autograd(
    lambda ctx, grad: fused_swiglu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
fused_rope.register_autograd(
    lambda ctx, grad_q, grad_k: (*fused_rope(grad_q, grad_k, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[2:]),
)


def _swiglu_mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(fused_swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


@contextlib.contextmanager
def fused_blocks(model: Any) -> Iterator[None]:
    """Replace the model's RMSNorm, RoPE and SwiGLU by one operator each inside the context; other forms are kept."""
    modules = set()
    for part in model.modules():
        name = type(part).__name__
        if name.endswith("RMSNorm") and hasattr(part, "weight"):
            part.forward = lambda x, part=part: fused_norm(x, part.weight)[0]
        elif hasattr(part, "gate_proj") and getattr(model.config, "hidden_act", "") == "silu":
            part.forward = partial(_swiglu_mlp, part)
        elif name.endswith("Attention"):
            modules.add(sys.modules[type(part).__module__])
    kept = {m: m.apply_rotary_pos_emb for m in modules if hasattr(m, "apply_rotary_pos_emb")}
    try:
        for m in kept:
            m.apply_rotary_pos_emb = lambda q, k, cos, sin, *args, **kw: fused_rope(q, k, cos, sin)
        yield
    finally:
        for m, rope in kept.items():
            m.apply_rotary_pos_emb = rope
